"""Where updates are: who takes part, what is accepted, what is averaged. It sees no row and loads no model."""
