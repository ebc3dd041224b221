"""ModelOpt's own calibrations."""
