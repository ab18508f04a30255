"""Independent references: NumPy, float64, written from the equations. Nothing here imports rewire."""
