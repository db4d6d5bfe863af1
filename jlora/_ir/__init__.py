"""The intermediate form: an adapted weight, and what can be done with one."""
