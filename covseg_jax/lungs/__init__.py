"""Phantoms to a network that sees lungs where they are dense: nobody's labels."""
