"""What travels between server and clients: messages as bytes and back, checked before they are believed."""
