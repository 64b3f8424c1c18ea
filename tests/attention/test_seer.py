"""SeerAttention learns its gates from dense attention, and attends to what they choose."""

DENSE_OPTIONS = [
    {"gates": "decode", "block_size": 16, "token_budget": 1024},
    {"gates": "prefill", "block_size": 16, "density": 1.0},
    {"gates": "prefill", "block_size": 16},
]
BFLOAT16_ERROR = 0.1  # choices between close scores fall differently
