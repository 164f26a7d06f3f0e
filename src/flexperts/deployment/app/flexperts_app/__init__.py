"""The Flower App that is sent to a SuperLink."""
