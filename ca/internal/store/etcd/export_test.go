package etcd

// For tests of what happens between two steps.

import (
	"context"

	"merlon.dev/ca/internal/store"
)

// Looked is what a new epoch is decided by.
type Looked struct{ m marks }

// Look is the first step of NextEpoch.
func Look(ctx context.Context, s store.Store) (Looked, error) {
	m, err := s.(*Store).readMarks(ctx)
	return Looked{m}, err
}

// WriteEpoch is the last one; the layout stays as it was.
func WriteEpoch(ctx context.Context, st store.Store, l Looked) error {
	s := st.(*Store)
	ops, err := s.putLayout(s.layout.layoutRecord, s.layout.first, l.m.seen)
	if err != nil {
		return err
	}
	return s.writeEpoch(ctx, l.m.laid.ModRevision, l.m.now, ops)
}

// Reason is what is said of a member that was not connected for each of these,
// one after the other; nil is a connection.
func Reason(because ...error) error {
	m := &member{}
	for _, err := range because {
		m.setReason(err)
	}
	return m.reason(nil)
}
