"""The shipped base: how smol-moe is made and found."""
