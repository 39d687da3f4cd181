// What an Envoy is told. That it does so is seen with a real one, in
// integration/envoy/authz_test.go.

package extauthz

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
)

func written(options []*corev3.HeaderValueOption) string {
	var all []string
	for _, o := range options {
		all = append(all, fmt.Sprintf("%s %s=%s", strings.SplitN(o.GetAppendAction().String(), "_", 2)[0], o.GetHeader().GetKey(), o.GetHeader().GetValue()))
	}
	return strings.Join(all, "; ")
}

func TestAllowed(t *testing.T) {
	c := read(asked("GET", "/", "x-spiffe-id", "forged", "x_spiffe_id", "forged", "X-Role", "admin", "x_role", "admin", "x-debug", "1"))
	c.in.Source = "spiffe://shop.test/web"
	for name, tt := range map[string]struct {
		send                       *policy.Response
		headers, removed, response string
	}{
		"nothing more": {nil, "OVERWRITE x-spiffe-id=spiffe://shop.test/web", "x-forwarded-client-cert x_spiffe_id", ""},
		"what the policy adds and takes away": {
			&policy.Response{
				Headers:         []policy.HeaderField{{Name: "x-role", Value: "reader"}, {Name: "x-team", Value: "a"}, {Name: "x-team", Value: "b"}},
				ResponseHeaders: []policy.HeaderField{{Name: "x-own", Value: "1"}, {Name: "x-two", Value: "1"}, {Name: "x-two", Value: "2"}},
				RemoveHeaders:   []string{"x-debug", "x-not-there", "x-role"},
			},
			"OVERWRITE x-spiffe-id=spiffe://shop.test/web; OVERWRITE x-role=reader; OVERWRITE x-team=a,b",
			"x-debug x-forwarded-client-cert x-not-there x_role x_spiffe_id",
			"ADD x-own=1; APPEND x-two=1; APPEND x-two=2",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := answer(&c, policy.Decision{Allow: true, Reason: policy.Allowed, DecisionID: policy.NewDecisionID(), RuleID: "r", Response: tt.send})
			ok := m.GetOkResponse()
			if m.GetStatus().GetCode() != 0 || ok == nil || m.GetDynamicMetadata().GetFields()["rule_id"].GetStringValue() != "r" {
				t.Fatalf("answer() = %v", m)
			}
			if got := written(ok.GetHeaders()); got != tt.headers {
				t.Errorf("headers: %s\nwant %s", got, tt.headers)
			}
			if got := strings.Join(ok.GetHeadersToRemove(), " "); got != tt.removed {
				t.Errorf("removed: %s\nwant %s", got, tt.removed)
			}
			if got := written(ok.GetResponseHeadersToAdd()); got != tt.response {
				t.Errorf("of the answer: %s\nwant %s", got, tt.response)
			}
		})
	}
}

func TestDeniedOverHTTP(t *testing.T) {
	c := read(asked("GET", "/"))
	d := policy.Deny(policy.NoGrant)
	m := answer(&c, d)
	want := denial.HTTP(d)
	got := m.GetDeniedResponse()
	if codes.Code(m.GetStatus().GetCode()) != codes.PermissionDenied || int(got.GetStatus().GetCode()) != want.Status || got.GetBody() != want.Body ||
		written(got.GetHeaders()) != written(replacing(want.Fields)) || m.GetDynamicMetadata().GetFields()["decision_id"].GetStringValue() != d.DecisionID.String() {
		t.Errorf("answer() = %v; want %+v", m, want)
	}
}

// fromHTTP is what Envoy makes of an HTTP status (its httpToGrpcStatus).
func fromHTTP(status int) codes.Code {
	switch status {
	case 400:
		return codes.Internal
	case 401:
		return codes.Unauthenticated
	case 403:
		return codes.PermissionDenied
	case 404:
		return codes.Unimplemented
	case 429, 502, 503, 504:
		return codes.Unavailable
	}
	return codes.Unknown
}

// Whatever status a policy wants, the details name the code that Envoy sends, and
// clients find the denial in them.
func TestDeniedOverGRPC(t *testing.T) {
	c := read(with(asked("POST", "/shop.Orders/List"), protocol("grpc")))
	rapid.Check(t, func(t *rapid.T) {
		d := policy.Deny(rapid.SampledFrom(policy.Reasons()[1:]).Draw(t, "reason"))
		if rapid.Bool().Draw(t, "response") {
			d.Response = &policy.Response{
				Status: rapid.IntRange(199, 599).Draw(t, "status"), Body: rapid.String().Draw(t, "body"),
				Headers: []policy.HeaderField{{Name: "retry-after", Value: "1"}, {Name: "content-type", Value: "text/html"}},
			}
		}
		m := answer(&c, d)
		sent := fromHTTP(int(m.GetDeniedResponse().GetStatus().GetCode()))
		if codes.Code(m.GetStatus().GetCode()) == codes.OK || sent != codes.Code(m.GetStatus().GetCode()) {
			t.Fatalf("Envoy sends %s; the answer is %s", sent, codes.Code(m.GetStatus().GetCode()))
		}
		fields := m.GetDeniedResponse().GetHeaders()
		i := slices.IndexFunc(fields, func(o *corev3.HeaderValueOption) bool { return o.GetHeader().GetKey() == "grpc-status-details-bin" })
		details, err := base64.RawStdEncoding.DecodeString(fields[i].GetHeader().GetValue())
		if err != nil {
			t.Fatal(err)
		}
		var st statuspb.Status
		if err := proto.Unmarshal(details, &st); err != nil {
			t.Fatal(err)
		}
		told, ok := denial.FromStatus(status.FromProto(&st).Err())
		if !ok || codes.Code(st.GetCode()) != sent || told.Reason != d.Reason || told.DecisionID != d.DecisionID.String() || st.GetMessage() != m.GetDeniedResponse().GetBody() {
			t.Fatalf("the details are %v; want %s for %s", &st, sent, d.Reason)
		}
		if slices.ContainsFunc(fields, func(o *corev3.HeaderValueOption) bool { return o.GetHeader().GetKey() == "content-type" }) {
			t.Fatal("a gRPC answer with the policy's content type")
		}
	})
}
