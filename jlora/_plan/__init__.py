"""Plans of compiled programs for hardware that is not there."""
