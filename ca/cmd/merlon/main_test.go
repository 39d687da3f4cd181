// Mistakes that testscript cannot type.

package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

func TestTextThatIsNotUTF8IsRefusedByName(t *testing.T) {
	var out, stderr bytes.Buffer
	code := run(t.Context(), []string{"entry", "create", "--spiffe-id", "spiffe://a.test/\xff", "--selector", "unix:uid:1"}, &out, &stderr)
	if want := `--spiffe-id "spiffe://a.test/\xff" is not valid UTF-8`; code != exitUsage || !strings.Contains(stderr.String(), want) || !strings.Contains(stderr.String(), "hint: ") {
		t.Errorf("exit code %d, %q; want %d, %q and a hint", code, stderr.String(), exitUsage, want)
	}
}

// Every refusal that is about proposals has something to do next.
func TestRefusedProposalsHaveHints(t *testing.T) {
	for name := range capb.Refusal_value {
		reason := strings.TrimPrefix(name, "REFUSAL_")
		if !strings.HasPrefix(reason, "PROPOSAL") {
			continue
		}
		for _, code := range []codes.Code{codes.FailedPrecondition, codes.ResourceExhausted, codes.PermissionDenied, codes.InvalidArgument} {
			st, err := status.New(code, "not proposed").WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "merlon.dev"})
			if err != nil {
				t.Fatal(err)
			}
			if _, message, hint := describe(fmt.Errorf("taint: %w", st.Err())); message == "" || hint == "" || hint != approvalHints[reason] {
				t.Errorf("%s (%s): %q, hint %q", reason, code, message, hint)
			}
		}
	}
}
