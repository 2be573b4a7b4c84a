"""The only room that knows order, memory, devices and resume."""
