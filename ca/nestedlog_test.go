// What a nested CA says in its log while nothing is heard from above.

package ca

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/upstream"
)

// The first failure since the start is in the log, and each other reason; not each
// attempt.
func TestEachReasonIsLoggedOnce(t *testing.T) {
	var log bytes.Buffer
	s, err := New(Config{
		TrustDomain: "shop.test", DataDir: t.TempDir(), Development: true, Upstream: config.UpstreamMerlon, UpstreamAddress: "127.0.0.1:1",
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := upstream.Open(t.Context(), upstream.Config{TrustDomain: s.td, Dir: filepath.Join(t.TempDir(), "keys")})
	if err != nil {
		t.Fatal(err)
	}
	u := s.above(&parts{keys: keys})
	for _, step := range []struct {
		err    error
		logged string
	}{
		{status.Error(codes.Unavailable, "read tcp 127.0.0.1:4711: connection refused"), "is away"},
		{status.Error(codes.Unavailable, "read tcp 127.0.0.1:4712: connection refused"), ""},
		{status.Error(codes.FailedPrecondition, "it has seen revision 9"), "do not go together"},
		{status.Error(codes.FailedPrecondition, "it has seen revision 10"), ""},
		{errSilent, "is away"},
		{nil, "is followed"},
		{errSilent, "is away"},
	} {
		log.Reset()
		if step.err == nil {
			u.isUp(t.Context())
		} else {
			u.fails(t.Context(), step.err)
		}
		got := log.String()
		if step.logged == "" && got != "" || !strings.Contains(got, step.logged) || strings.Count(got, "\n") > 1 {
			t.Errorf("%v: logged %q; want %q", step.err, got, step.logged)
		}
	}
}
