#!/bin/sh
# Merlon's CA as the consumer that spiffe-conform judges: --consumer consumers/merlon.sh.
# MERLON_ADMIN says which CA; merlon is in PATH, or named by MERLON.
merlon=${MERLON:-merlon}
case $1 in
follow)
	case $3 in
	https_web) "$merlon" federation follow "$2" --profile "$3" --url "$4" --web-ca "$5" ;;
	https_spiffe) "$merlon" federation follow "$2" --profile "$3" --url "$4" --endpoint-id "$5" --bundle "$6" ;;
	esac
	;;
refresh) "$merlon" federation refresh "$2" ;;
show) "$merlon" federation show "$2" -o jwks ;;
esac
