// Package etcd keeps the store in an etcd v3 cluster, for CAs of more than one
// replica.
package etcd

import (
	"context"
	"errors"
	"iter"
	"log/slog"

	"merlon.dev/ca/internal/store"
)

// DefaultPrefix begins all keys in etcd.
const DefaultPrefix = "/merlon/"

// Config says where etcd is.
type Config struct {
	// Endpoints are the members' client URLs, https://host:2379 or, for tests
	// on loopback, http://.
	Endpoints []string
	// CAFile, CertFile and KeyFile are PEM files of mutual TLS; they are needed
	// unless all endpoints are on loopback.
	CAFile, CertFile, KeyFile string
	// Prefix begins all keys; empty means DefaultPrefix.
	Prefix string
	// Logger takes what the store has to say. Nil discards it.
	Logger *slog.Logger
}

var errNotBuilt = errors.New("the etcd store is not built yet")

// Open connects to the store in etcd, laying it out on first use.
func Open(ctx context.Context, cfg Config) (store.Store, error) { return nil, errNotBuilt }

// Import fills an empty store in etcd with pairs, which keep their
// ModRevision; the store goes on above revision at. A store that is there
// already, or an import that was broken off, is an error.
func Import(ctx context.Context, cfg Config, at uint64, pairs iter.Seq2[store.KV, error]) error {
	return errNotBuilt
}
