"""Running calibration data through a model and collecting the statistics that selections are made from."""
