"""The order of the samples, and how their images reach the device."""
