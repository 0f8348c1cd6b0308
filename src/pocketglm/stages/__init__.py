"""L4: compress, export, bench, prove: one public function each."""
