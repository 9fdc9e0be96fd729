"""The only rooms that know transformers, peft and accelerate: anatomy, replay, reference, and the state guard."""
