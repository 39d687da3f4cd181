package badger

// How what is durable becomes visible. Badger has the batch; now the head must
// have it too, or a log that Badger cuts short when it opens would go
// unnoticed. A batch is published to readers and watchers, and its
// transactions are answered, after both.

// publishLoop runs until committed is closed and drained. When it falls behind
// the committer, one head serves several batches.
func (s *Store) publishLoop() {
	for first := range s.committed {
		s.publish(s.more(first))
	}
}

// more takes what else has been committed.
func (s *Store) more(first committed) []committed {
	batches := []committed{first}
	for {
		select {
		case next, open := <-s.committed:
			if !open {
				return batches
			}
			batches = append(batches, next)
		default:
			return batches
		}
	}
}

// publish syncs the head over the batches and answers all that wait for them.
func (s *Store) publish(batches []committed) {
	var (
		records   []record
		tip       point
		compacted uint64
	)
	for _, b := range batches {
		if len(b.records) > 0 {
			records = append(records, b.records...)
			tip, compacted = b.tip, b.compacted
		}
	}
	if len(records) > 0 {
		if err := s.head.write(tip, false); err != nil {
			s.stopWrites(tip.revision, err) // failed is read below
		}
	}
	failed := s.failed.Load()
	if failed == nil && len(records) > 0 {
		s.history.publish(records, compacted)
		s.db.SetDiscardTs(compacted) // after publish: readers below it must notice
	}
	for _, b := range batches {
		refused := b.refused
		if refused == nil && failed != nil {
			refused = uncertain(*failed) // Badger has it
		}
		b.answer(refused)
	}
}

func (c committed) answer(refused error) {
	for _, r := range c.requests {
		if refused != nil {
			r.result.Succeeded, r.result.Revision, r.err = false, 0, refused
		}
		close(r.done)
	}
}
