"""Methods that multiply what a module computes or computes with: scales, rotations, reflections."""
