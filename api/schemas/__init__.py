"""Bodies of requests and answers, a file a resource. Times are Unix seconds."""
