package denial

import (
	"testing"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/policy"
)

// A status that a server sends is a denial only if it is one by its code, too, and
// makes no line of a log.
func FuzzFromStatus(f *testing.F) {
	for _, e := range []*Error{By(policy.Decision{Reason: policy.NoGrant, DecisionID: policy.NewDecisionID()}), {Reason: policy.Error, DecisionID: "x", Status: 503, Message: "a\nb"}} {
		b, err := proto.Marshal(e.GRPCStatus().Proto())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var pb spb.Status
		if proto.Unmarshal(b, &pb) != nil {
			return
		}
		e, ok := FromStatus(status.ErrorProto(&pb))
		if !ok {
			return
		}
		if codeOf(e.Status) != status.FromProto(&pb).Code() || e.DecisionID == "" {
			t.Fatalf("%v is taken for %+v", &pb, e)
		}
		for _, r := range e.Error() {
			if r < ' ' {
				t.Fatalf("%v reads %q", &pb, e.Error())
			}
		}
	})
}
