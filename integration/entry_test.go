// Registration entries as a workload with an open stream sees them.

package integration_test

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/integration/stage"
)

func TestEntryComesAndGoesOnAnOpenStream(t *testing.T) {
	d := stage.Dev(t)
	first := d.Entry("/first")
	stream := watchSVIDs(t, d)
	stream.expect(t, d.ID("/first"))
	second := d.Entry("/second")
	stream.expect(t, d.ID("/second"))
	d.Merlon("entry", "delete", first)
	d.Merlon("entry", "delete", second)
	deadline := time.After(15 * time.Second)
	for {
		select {
		case <-stream.got: // the second alone
		case err := <-stream.err:
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("the stream ended with %v; want PermissionDenied", err)
			}
			return
		case <-deadline:
			t.Fatal("the stream did not end within 15 s of the last deletion")
		}
	}
}

// Deleting an entry revokes what was issued for it.
func TestDeletedEntryIsRevoked(t *testing.T) {
	d := stage.Dev(t)
	entry := d.Entry("/doomed")
	d.Merlon("entry", "delete", entry)
	var records []struct {
		SPIFFEID string `json:"spiffe_id"`
	}
	stage.Decode(t, d.Merlon("revocation", "list", "-o", "json"), &records)
	if len(records) != 1 || records[0].SPIFFEID != d.ID("/doomed") {
		t.Errorf("revocations = %+v; want one of %s", records, d.ID("/doomed"))
	}
}
