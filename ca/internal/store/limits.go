package store

// What a transaction may hold. One rule for all implementations, so that what
// one store takes the other takes too.

import (
	"errors"
	"fmt"
)

// Limits of what is stored, in bytes and in writes.
const (
	// MaxKeyBytes leaves room for a SPIFFE ID of 2048 bytes (SPIFFE-ID §2.3)
	// with what is put around it.
	MaxKeyBytes = 4 << 10
	// MaxValueBytes keeps every value in the tree of the Badger store, never in
	// its value log. Larger things are stored in parts.
	MaxValueBytes = 512 << 10
	// MaxTxnBytes bounds the keys and values that a transaction writes, both
	// branches together: etcd is sent both, in a request of 1.5 MiB at most.
	MaxTxnBytes = 1_000 << 10
	// MaxTxnOps bounds the writes and the comparisons of one transaction.
	MaxTxnOps = 128
)

// CheckTxn tells whether a transaction is well-formed and within the limits.
// Every implementation calls it before anything else.
func CheckTxn(cmps []Cmp, then, otherwise []Op) error {
	if len(cmps) > MaxTxnOps {
		return fmt.Errorf("transaction with %d comparisons, at most %d: %w", len(cmps), MaxTxnOps, ErrTooLarge)
	}
	for _, c := range cmps {
		if err := checkKey(c.Key); err != nil {
			return err
		}
	}
	total := 0
	for _, branch := range [][]Op{then, otherwise} {
		n, err := checkOps(branch)
		if err != nil {
			return err
		}
		total += n
	}
	if total > MaxTxnBytes {
		return fmt.Errorf("transaction writes %d bytes, at most %d: %w", total, MaxTxnBytes, ErrTooLarge)
	}
	return nil
}

// checkOps returns the bytes of one branch.
func checkOps(ops []Op) (total int, err error) {
	if len(ops) > MaxTxnOps {
		return 0, fmt.Errorf("transaction with %d writes, at most %d: %w", len(ops), MaxTxnOps, ErrTooLarge)
	}
	keys := make(map[string]struct{}, len(ops))
	for _, op := range ops {
		if err := checkKey(op.Key); err != nil {
			return 0, err
		}
		if _, twice := keys[op.Key]; twice {
			return 0, fmt.Errorf("transaction writes key %q twice", op.Key)
		}
		keys[op.Key] = struct{}{}
		if len(op.Value) > MaxValueBytes {
			return 0, fmt.Errorf("value of key %q has %d bytes, at most %d: %w", op.Key, len(op.Value), MaxValueBytes, ErrTooLarge)
		}
		total += len(op.Key) + len(op.Value)
	}
	return total, nil
}

func checkKey(key string) error {
	switch {
	case key == "":
		return errors.New("transaction with an empty key")
	case len(key) > MaxKeyBytes:
		return fmt.Errorf("key of %d bytes, at most %d: %w", len(key), MaxKeyBytes, ErrTooLarge)
	}
	return nil
}
