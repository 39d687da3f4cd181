// Appending what belongs together.

package audit

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// AppendAll writes records in order and returns once all are on disk; they
// share their syncs. Otherwise it is like Append.
func (l *Log) AppendAll(ctx context.Context, records []Record) error {
	now := time.Now()
	waiting := make([]*pending, 0, len(records))
	for _, r := range records {
		if r.Type == "" {
			return errors.New("append audit record: no type")
		}
		body, err := r.encode(now)
		if err != nil {
			return fmt.Errorf("append audit record: %w", err)
		}
		waiting = append(waiting, &pending{body: body, done: make(chan error, 1)})
	}
	for _, p := range waiting {
		if err := l.enqueue(ctx, p); err != nil {
			return err
		}
	}
	for _, p := range waiting {
		select {
		case err := <-p.done:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
