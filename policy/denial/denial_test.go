// What the caller of a denied call reads, over HTTP and over gRPC.

package denial

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"

	"merlon.dev/policy"
)

func TestHTTP(t *testing.T) {
	id := policy.NewDecisionID()
	fields := func(fields ...string) (all []policy.HeaderField) {
		for i := 0; i < len(fields); i += 2 {
			all = append(all, policy.HeaderField{Name: fields[i], Value: fields[i+1]})
		}
		return append(all, policy.HeaderField{Name: DecisionIDHeader, Value: id.String()})
	}
	own := []string{"cache-control", "no-store", "x-content-type-options", "nosniff", "content-type"}
	for name, tt := range map[string]struct {
		d    policy.Decision
		want Answer
	}{
		"no answer of the policy's own": {
			policy.Decision{Reason: policy.NoGrant, DecisionID: id},
			Answer{403, fields(append(own, ProblemContentType)...), ""},
		},
		"an ambiguous request": {
			policy.Decision{Reason: policy.BadRequest, DecisionID: id},
			Answer{400, fields(append(own, ProblemContentType)...), ""},
		},
		"status, fields and body": {
			policy.Decision{Reason: policy.DenyRule, DecisionID: id, Response: &policy.Response{
				Status: 429, Body: "slow down", Headers: []policy.HeaderField{{Name: "retry-after", Value: "1"}, {Name: "cache-control", Value: "private"}},
			}},
			Answer{429, fields("x-content-type-options", "nosniff", "content-type", "text/plain; charset=utf-8", "retry-after", "1", "cache-control", "private"), "slow down"},
		},
		"a type of the policy's own, with its body": {
			policy.Decision{Reason: policy.DenyRule, DecisionID: id, Response: &policy.Response{
				Body: "<p>no</p>", Headers: []policy.HeaderField{{Name: "content-type", Value: "text/html"}},
			}},
			Answer{403, fields(append(own[:4:4], "content-type", "text/html")...), "<p>no</p>"},
		},
		"a type for the problem document": {
			policy.Decision{Reason: policy.DenyRule, DecisionID: id, Response: &policy.Response{
				Headers: []policy.HeaderField{{Name: "content-type", Value: "text/html"}, {Name: "x-a", Value: "1"}, {Name: "x-a", Value: "2"}},
			}},
			Answer{403, fields(append(own, ProblemContentType, "x-a", "1", "x-a", "2")...), ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := HTTP(tt.d)
			if tt.want.Body == "" {
				var p Problem
				if err := json.Unmarshal([]byte(got.Body), &p); err != nil {
					t.Fatal(err)
				}
				want := Problem{Type: ProblemType, Title: p.Title, Status: tt.want.Status, Reason: tt.d.Reason, DecisionID: id.String(), Hint: tt.d.Hint()}
				if diff := cmp.Diff(want, p); diff != "" || p.Title == "" {
					t.Errorf("problem (-want +got):\n%s", diff)
				}
				got.Body = ""
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("HTTP() (-want +got):\n%s", diff)
			}
		})
	}
}

// What is told over gRPC is read again as it was said, and is never OK.
func TestGRPCThereAndBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := policy.Decision{
			Reason: rapid.SampledFrom(policy.Reasons()[1:]).Draw(t, "reason"), DecisionID: policy.NewDecisionID(),
			Response: &policy.Response{
				Status: rapid.SampledFrom([]int{0, 200, 302, 400, 401, 403, 404, 418, 429, 500, 503, 504}).Draw(t, "status"),
				Body:   rapid.String().Draw(t, "body"),
			},
		}
		st := By(d).GRPCStatus()
		if st.Code() == codes.OK {
			t.Fatal("a denial is OK")
		}
		back, ok := FromStatus(st.Err())
		if !ok {
			t.Fatalf("%v is not read as a denial", st)
		}
		want := &Error{
			Reason: d.Reason, DecisionID: d.DecisionID.String(), Hint: d.Hint(),
			Status: d.Response.Status, Message: truncated(d.Response.Body),
		}
		if diff := cmp.Diff(want, back); diff != "" || len(back.Message) > maxMessage {
			t.Fatalf("(-want +got):\n%s", diff)
		}
		if strings.ContainsAny(back.Error(), "\n\r\x1b") {
			t.Fatalf("%q can forge a log line", back.Error())
		}
	})
}
