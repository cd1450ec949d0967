"""The full-screen terminal program `lumina`. Never imports torch."""
