// Package grpcauth enforces identity and policy on gRPC: [ServerOptions] for
// servers, [DialOptions] for clients.
package grpcauth
