// What the agent takes for a decision that an Envoy asks for (ext_authz), beside a
// call on the same socket that does nothing but answer, and beside opa-envoy-plugin.

package bench_test

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
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
	variants := []measure.Variant{
		{Name: "nothing", Run: atOnceOver(b, nothing), Ops: atOnce * callsEach, Processes: []int{d.Agent.PID()}},
		{Name: "agent", Run: atOnceOver(b, check), Ops: atOnce * callsEach, Processes: []int{d.Agent.PID()}},
	}
	if theirs, pid, ok := opaEnvoy(b); ok {
		check := func(ctx context.Context) bool {
			m, err := theirs.Check(ctx, req)
			return err == nil && m.GetStatus().GetCode() == 0
		}
		stage.Eventually(b, "opa-envoy-plugin allows it", func() error {
			if !check(b.Context()) {
				return errors.New("denied, or not there yet")
			}
			return nil
		})
		variants = append(variants, measure.Variant{Name: "opa-envoy", Run: atOnceOver(b, check), Ops: atOnce * callsEach, Processes: []int{pid}})
	}
	measure.Interleaved(b, 1, variants...)
}

const atOnce, callsEach = 16, 100

// atOnceOver makes a function that has 16 callers make 100 calls each.
func atOnceOver(b *testing.B, call func(context.Context) bool) func() error {
	return func() error {
		var all sync.WaitGroup
		var failed atomic.Bool
		for range atOnce {
			all.Go(func() {
				for range callsEach {
					if !call(b.Context()) {
						failed.Store(true)
						return
					}
				}
			})
		}
		all.Wait()
		if failed.Load() {
			return errors.New("a call failed")
		}
		return nil
	}
}

// opaEnvoy starts the opa-envoy-plugin that MERLON_BENCH_OPA_ENVOY names, if it names
// one, with a policy that says the same of this call.
func opaEnvoy(b *testing.B) (client authv3.AuthorizationClient, pid int, ok bool) {
	b.Helper()
	program := os.Getenv("MERLON_BENCH_OPA_ENVOY")
	if program == "" {
		b.Log("opa-envoy-plugin is not measured: set MERLON_BENCH_OPA_ENVOY to its binary")
		return nil, 0, false
	}
	file := filepath.Join(b.TempDir(), "policy.rego")
	const rego = `package envoy.authz

default allow := false

allow if {
	endswith(input.attributes.source.principal, "/me")
	input.attributes.request.http.method == "GET"
	input.parsed_path[0] == "orders"
}
`
	if err := os.WriteFile(file, []byte(rego), 0o600); err != nil {
		b.Fatal(err)
	}
	address, api := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(b)), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(b))
	cmd := exec.Command(program, "run", "--server", "--addr", api, "--diagnostic-addr", fmt.Sprintf("127.0.0.1:%d", stage.FreePort(b)), "--disable-telemetry", "--log-level", "error",
		"--set", "plugins.envoy_ext_authz_grpc.addr="+address, "--set", "plugins.envoy_ext_authz_grpc.path=envoy/authz/allow", file)
	var log stage.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if b.Failed() {
			b.Logf("opa-envoy-plugin said:\n%s", log.String())
		}
	})
	cc, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cc.Close() })
	return authv3.NewAuthorizationClient(cc), cmd.Process.Pid, true
}
