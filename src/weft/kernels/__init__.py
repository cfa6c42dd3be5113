"""The only folder that knows devices: operations, their references, their fast forms."""
