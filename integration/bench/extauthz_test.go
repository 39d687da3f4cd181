// What the agent takes for a decision that an Envoy asks for (ext_authz), beside a
// call on the same socket that does nothing but answer.

package bench_test

import (
	"context"
	"encoding/pem"
	"net/url"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

// BenchmarkCheck is rounds of 16 at a time over one connection, as an Envoy has it: a
// request with ten header fields and the caller's certificate, decided by the compiled
// policy, in turn with a health check.
func BenchmarkCheck(b *testing.B) {
	d := stage.Separate(b)
	untilAttested(b, d)
	admin := capb.NewAdminClient(dial(b, d.Admin))
	d.Entry("/me")
	push(b, admin, built(b, d, "http: {methods: [GET], paths: [/orders/*]}", ""))
	leaf := forge.New(b, d.TrustDomain).Intermediate().Leaf("/me")
	certificate := url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Chain[0].Raw})))
	fields := &corev3.HeaderMap{}
	for _, f := range [][2]string{
		{":method", "GET"},
		{":path", "/orders/1?full=1"},
		{":authority", "orders.shop.test"},
		{":scheme", "https"},
		{"user-agent", "Mozilla/5.0 (X11; Linux x86_64)"},
		{"accept", "application/json"},
		{"x-forwarded-proto", "https"},
		{"x-request-id", "a4b667e0-405d-45bc-9232-3f248a7e5a5d"},
		{"x-forwarded-for", "192.0.2.2"},
		{"cookie", "session=0123456789abcdef"},
	} {
		fields.Headers = append(fields.Headers, &corev3.HeaderValue{Key: f[0], RawValue: []byte(f[1])})
	}
	req := &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		ContextExtensions: map[string]string{"merlon.protocol": "http"},
		Source:            &authv3.AttributeContext_Peer{Principal: d.ID("/me"), Certificate: certificate},
		Destination:       &authv3.AttributeContext_Peer{Principal: d.ID("/me")},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Path: "/orders/1?full=1", Host: "orders.shop.test", Protocol: "HTTP/2", HeaderMap: fields,
		}},
	}}
	cc := dial(b, d.WorkloadAPI)
	check := func(ctx context.Context) bool {
		m, err := authv3.NewAuthorizationClient(cc).Check(ctx, req)
		return err == nil && m.GetOkResponse() != nil
	}
	nothing := func(ctx context.Context) bool {
		_, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
		return err == nil
	}
	stage.Eventually(b, "the policy is there", func() error {
		_, err := authv3.NewAuthorizationClient(cc).Check(b.Context(), req)
		if err == nil && !check(b.Context()) {
			err = context.DeadlineExceeded
		}
		return err
	})
	var forChecks, forNothing time.Duration // of the agent
	calls := 0
	for b.Loop() {
		forChecks += cpuOfCalls(b, d, check)
		forNothing += cpuOfCalls(b, d, nothing)
		calls += atOnce * callsEach
	}
	each := func(cpu time.Duration) float64 { return float64(cpu.Nanoseconds()) / 1000 / float64(calls) }
	b.ReportMetric(each(forChecks), "check-µs")
	b.ReportMetric(each(forNothing), "nothing-µs")
}

const atOnce, callsEach = 16, 100

// cpuOfCalls is what a round of calls costs the agent.
func cpuOfCalls(b *testing.B, d *stage.Domain, call func(context.Context) bool) time.Duration {
	b.Helper()
	before := measure.CPUOf(b, d.Agent.PID())
	var all sync.WaitGroup
	for range atOnce {
		all.Go(func() {
			for range callsEach {
				if !call(b.Context()) {
					b.Error("a call failed")
				}
			}
		})
	}
	all.Wait()
	return measure.CPUOf(b, d.Agent.PID()) - before
}
