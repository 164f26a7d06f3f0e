"""The shipped base: smol-moe, a small pretrained MoE built by splitting dense FFNs into experts."""
