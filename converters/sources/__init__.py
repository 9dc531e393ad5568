"""Sources of a conversion: one module per kind of source, all behind one interface."""
