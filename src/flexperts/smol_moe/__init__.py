"""The shipped base: how smol-moe is built and found."""
