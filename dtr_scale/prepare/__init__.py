"""From pictures and captions to shards: listing, encoding, writing, inspection."""
