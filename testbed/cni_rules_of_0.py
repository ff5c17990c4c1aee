"""What 0.3.1 and 0.4.0 oblige to and 1.0.0 and 1.1.0 do not repeat in other words: see `cni_rules.py`."""

from __future__ import annotations

from testbed.cni_rule import (
    AGENT,
    BAD,
    BOTH_RUNTIMES,
    CHAIN,
    EXECUTABLE,
    PODMAN,
    SPEC,
    UNIT_API,
    UNIT_REQUEST,
    UNIT_RESULT,
    Rule,
    delegated,
    plugin,
    runtime,
)

_GENERAL, _OVERVIEW = "0.4.0 General considerations", "0.4.0 Overview"
_PARAMETERS, _DEL, _CHECK = "0.4.0 Parameters", "0.4.0 DEL", "0.4.0 CHECK"
_RESULT, _LISTS = "0.4.0 Result", "0.4.0 Network Configuration Lists"
_IPAM, _IPS, _ROUTES = "0.4.0 IP Allocation", "0.4.0 IPs", "0.4.0 Routes"
_CODES = "0.4.0 Well-known Error Codes"

OF_0: tuple[Rule, ...] = (
    runtime(
        _GENERAL,
        "The runtime must determine the container's networks, and the plugins of each",
        f"{CHAIN}test_several_interfaces_with_routes_by_source",
        *BOTH_RUNTIMES,
    ),
    runtime(
        _GENERAL,
        "Values that change between invocations must be in args",
        f"{UNIT_REQUEST}test_the_nearest_wish_for_rdma_counts",
        f"{UNIT_REQUEST}test_labels_come_with_the_network_configuration",
    ),
    runtime(
        _GENERAL,
        "The runtime must add the container to each network one after another",
        f"{CHAIN}test_several_interfaces_with_routes_by_source",
        f"{AGENT}test_two_interfaces_in_one_pod",
    ),
    runtime(
        _GENERAL,
        "A container must be uniquely identified by a ContainerID",
        f"{BAD}test_an_attachment_that_exists",
    ),
    runtime(
        _GENERAL,
        "A runtime must not call ADD twice, without a DEL, for the same network, container id and interface name",
        f"{BAD}test_an_attachment_that_exists",
        f"{BAD}test_adds_of_one_id_at_once",
    ),
    plugin(
        _OVERVIEW,
        "Each plugin must be implemented as an executable",
        f"{EXECUTABLE}test_add_hands_over_everything_and_prints_the_result",
    ),
    runtime(
        _PARAMETERS,
        "Runtimes must use the type of the network as the name of the executable",
        f"{SPEC}test_type_is_no_path_to_us",
        *BOTH_RUNTIMES,
    ),
    runtime(
        _PARAMETERS,
        "It must invoke the executable with the environment variables CNI_*",
        f"{EXECUTABLE}test_add_hands_over_everything_and_prints_the_result",
        f"{EXECUTABLE}test_every_missing_variable_is_named",
        *BOTH_RUNTIMES,
    ),
    runtime(
        _PARAMETERS,
        "The configuration must be streamed to the plugin through stdin",
        f"{EXECUTABLE}test_input_that_is_no_json_object",
        f"{EXECUTABLE}test_input_that_never_ends_is_waited_for_only_so_long",
    ),
    runtime(
        _DEL,
        "If there was an ADD, DEL must have its result as prevResult",
        f"{AGENT}test_del_twice",
        f"{UNIT_REQUEST}test_del_needs_neither_namespace_nor_a_good_configuration",
    ),
    runtime(
        _DEL,
        "The runtime must delete the cached result on a successful DEL",
        f"{SPEC}test_a_container_comes_again_after_del",
        *BOTH_RUNTIMES,
    ),
    plugin(
        _PARAMETERS,
        'Interface name: must not be empty, ".", or "..", must be less than 16 characters, must not contain /, : or'
        " whitespace",
        f"{EXECUTABLE}test_invalid_variables_are_named",
        f"{SPEC}test_interface_names",
    ),
    plugin(
        _RESULT,
        "Plugins must indicate success with a return code of zero and the result on stdout in the case of ADD",
        f"{AGENT}test_add_in_every_version",
    ),
    plugin(
        _RESULT,
        "cniVersion of the result must be consistent with that of the configuration",
        f"{AGENT}test_add_in_every_version",
        f"{UNIT_RESULT}test_every_version_is_written_as_the_specification_says",
    ),
    plugin(
        _RESULT,
        "The plugin must use CNI_IFNAME for the sandbox's interface or return an error if it cannot",
        f"{SPEC}test_interface_names",
        f"{BAD}test_an_interface_that_exists",
    ),
    plugin(
        _RESULT,
        "sandbox must be provided for interfaces created in a sandbox",
        f"{AGENT}test_add_in_every_version",
    ),
    plugin(
        _RESULT,
        "Errors must be indicated by a non-zero return code and the error on stdout",
        f"{SPEC}test_the_exit_status_says_how_it_went",
        f"{BAD}test_network_configuration",
    ),
    plugin(
        _LISTS,
        "Plugins of a version with prevResult must pass it through, modify or suppress it explicitly",
        f"{SPEC}test_another_plugin_in_front_of_ours",
        f"{UNIT_RESULT}test_a_chain_keeps_the_earlier_result_and_moves_our_indexes",
    ),
    plugin(
        _CHECK,
        "The plugin must return either nothing or an error",
        f"{AGENT}test_check_notices",
        f"{EXECUTABLE}test_the_other_commands_print_nothing_on_success",
    ),
    runtime(
        _LISTS,
        "The runtime must replace name and cniVersion with those of the list",
        *BOTH_RUNTIMES,
    ),
    runtime(
        _LISTS,
        "The key in runtimeConfig must match the name of the capability",
        f"{UNIT_REQUEST}test_capabilities_that_nobody_would_serve_are_refused",
    ),
    runtime(
        _LISTS,
        "For DEL the runtime must execute the plugins in reverse order, with prevResult unless it is not available",
        f"{CHAIN}test_every_version_through_a_chain",
    ),
    runtime(
        _LISTS,
        "For ADD the runtime must give each plugin after the first one the result of the one before",
        f"{CHAIN}test_every_version_through_a_chain",
        f"{SPEC}test_another_plugin_in_front_of_ours",
    ),
    runtime(
        _LISTS,
        "The runtime must execute each plugin in the list with the same environment",
        f"{CHAIN}test_every_version_through_a_chain",
    ),
    runtime(
        _LISTS,
        "When an error occurs the runtime must stop execution of the list",
        f"{CHAIN}test_a_later_plugin_that_refuses_leaves_nothing",
        f"{PODMAN}test_a_refusal_is_podmans_error",
    ),
    delegated(_IPAM, "An IPAM plugin must indicate success with a return code of zero and its result on stdout"),
    delegated(_IPAM, "cniVersion of its result must be consistent with that of the configuration"),
    plugin(
        _IPS,
        "All addresses and gateways must be valid for the given version",
        f"{AGENT}test_add_in_every_version",
        f"{UNIT_RESULT}test_the_validator_refuses_a_broken_result",
    ),
    plugin(
        _ROUTES,
        "All addresses in an entry must be of the same version",
        f"{AGENT}test_add_in_every_version",
        f"{UNIT_RESULT}test_the_validator_refuses_a_broken_result",
    ),
    plugin(
        _ROUTES,
        "Each entry must be relevant for the interface of CNI_IFNAME",
        f"{SPEC}test_what_the_result_lists_is_on_the_interface",
    ),
    plugin(
        _CODES,
        "Codes 1 to 99 must not be used other than as specified",
        f"{UNIT_API}test_each_error_has_its_code",
        f"{EXECUTABLE}test_any_environment_gives_one_answer",
        f"{BAD}test_network_configuration",
    ),
)
