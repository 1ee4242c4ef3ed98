"""The client commands of `residency`, a module a resource. They know the server only through `api.client`."""
