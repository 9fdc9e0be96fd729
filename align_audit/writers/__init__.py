"""Records and alerts shown: terminal, TensorBoard, pictures. Writers see records only: no model, no measure."""
