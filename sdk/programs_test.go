// Decisions by the compiled policy, from outside: with the agent there and gone.

package sdk_test

import (
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk/sdktest"
)

func TestAnEnforcementPointKnowsWhetherItHasToWait(t *testing.T) {
	td := sdktest.New(t)
	orders := td.Workload("orders")
	if orders.DecidesHere() {
		t.Error("there is no compiled policy, and the agent decides")
	}
	td.CompilePolicy()
	for end := time.Now().Add(30 * time.Second); !orders.DecidesHere(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the compiled policy is not used")
		}
	}
}

func TestCompiledPolicyOutlivesTheAgent(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.CompilePolicy()
	orders := td.Workload("orders")
	in := func(from string) *policy.Input {
		return &policy.Input{Source: td.ID(from).String(), Protocol: policy.HTTP, Method: "GET", Path: "/"}
	}
	await := func(what, from string, want policy.Reason) {
		t.Helper()
		var d policy.Decision
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if d = orders.Authorize(t.Context(), in(from)); d.Reason == want {
				return
			}
		}
		t.Fatalf("%s: %+v; want %s", what, d, want)
	}
	await("allowed by a rule", "web", policy.Allowed)
	await("denied without a rule", "eve", policy.NoGrant)
	td.Deny("web", "orders")
	await("a deny that is added", "web", policy.DenyRule)
	td.Forget("web", "orders")
	td.Allow("web", "orders")
	await("allowed again", "web", policy.Allowed)
	// Without an agent nobody else could answer. The program may still be on its
	// way when the call before was answered by the agent.
	for ruleID := ""; ruleID == ""; ruleID = orders.Authorize(t.Context(), in("web")).RuleID {
		time.Sleep(5 * time.Millisecond)
	}
	td.StopAgent("orders")
	for range 100 {
		if d := orders.Authorize(t.Context(), in("web")); !d.Allow {
			t.Fatalf("with the agent gone: %+v", d)
		}
		if d := orders.Authorize(t.Context(), in("eve")); d.Reason != policy.NoGrant {
			t.Fatalf("with the agent gone, a stranger: %+v", d)
		}
	}
	td.Deny("web", "orders")
	td.StartAgent("orders")
	await("a deny made while the agent was gone", "web", policy.DenyRule)
}
