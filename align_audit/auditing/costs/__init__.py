"""What an audit costs, counted before it is made: a model of it in matrix products, bytes, memory and messages."""
