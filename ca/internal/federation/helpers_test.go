package federation

import "merlon.dev/ca/internal/store"

// kvOf is the record that op writes.
func kvOf(op store.Op) store.KV { return store.KV{Key: op.Key, Value: op.Value, ModRevision: 1} }
