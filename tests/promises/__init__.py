"""What crosses packages: resume, faults, bad input, security, several processes, packaging."""
