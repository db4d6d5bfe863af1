"""Starts that depend on data: statistics of inputs (`calibrate`), EVA and CorDA from them, LoRA-GA from gradients."""
