"""When should somebody look? Records in, alerts out."""
