"""Loading models and sampling from them; nothing here needs what a Space lacks."""
