// What OpenTelemetry is told of gRPC calls. Where the program has no providers,
// nothing is.

package grpcauth

import (
	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/telemetry"
)

// over tells of the end of a call that this client made; of a denial with its
// decision.
func over(call *telemetry.RPC, err error) {
	if call == nil {
		return
	}
	if denied, ok := sdk.DeniedFromStatus(err); ok {
		telemetry.Denied(call.Context(), denied.Reason, denied.DecisionID, denied.Error())
	}
	call.Over(err)
}
