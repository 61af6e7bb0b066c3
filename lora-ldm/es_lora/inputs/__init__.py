"""What people bring, read as they write it: TOML, and names of a hub."""
