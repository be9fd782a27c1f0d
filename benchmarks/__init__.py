"""The measurements in the documentation."""
