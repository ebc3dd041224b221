"""How long a model takes, per step and for all of a schedule, beside the same model in torch."""
