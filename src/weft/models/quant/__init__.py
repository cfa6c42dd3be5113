"""Weight formats: how to recognise, read and apply them."""
