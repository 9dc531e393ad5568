"""What a conversion reads from: one file a kind of source, behind one interface."""
