"""Names of weights from their values: `jlora.peft.infer_names`."""
