"""Publishing an artifact on the Hub: verification, preparation, and the upload in one commit."""
